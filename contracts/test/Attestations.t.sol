// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Attestations} from "../src/Attestations.sol";
import {IAttestations} from "../src/interfaces/IAttestations.sol";
import {Lite} from "./Lite.sol";

contract AttestationsTest is Lite {
    Attestations private book;

    function setUp() public {
        vm.warp(1_800_000_000);
        book = new Attestations();
    }

    function testFuzz_itHoldsUntilItsTimeForItsIssuerAlone(address issuer, address other, address subject, bytes32 topic, uint40 life)
        public
    {
        vm.assume(subject != address(0) && issuer != other);
        life = uint40(within(life, 1, 10_000 days));
        uint40 until = uint40(block.timestamp) + life;
        vm.prank(issuer);
        book.attest(subject, topic, keccak256("fact"), until, "");
        require(book.isValid(issuer, subject, topic) && !book.isValid(other, subject, topic), "valid");
        vm.warp(until - 1);
        require(book.isValid(issuer, subject, topic), "still valid");
        vm.warp(until);
        require(!book.isValid(issuer, subject, topic), "expired");
    }

    function testFuzz_onlyTheIssuerRevokes(address issuer, address other, address subject, bytes32 topic) public {
        vm.assume(subject != address(0) && issuer != other);
        vm.prank(issuer);
        book.attest(subject, topic, 0, type(uint40).max, "");
        vm.prank(other);
        vm.expectRevert(abi.encodeWithSelector(IAttestations.Attestations_Unknown.selector, other, subject, topic));
        book.revoke(subject, topic);
        vm.prank(issuer);
        book.revoke(subject, topic);
        require(!book.isValid(issuer, subject, topic), "revoked");
    }
}
