// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ICommittee} from "../src/interfaces/ICommittee.sol";
import {IJobs} from "../src/interfaces/IJobs.sol";
import {IResolver} from "../src/interfaces/IResolver.sol";
import {Court} from "./Court.sol";

contract CommitteeTest is Court {
    address private constant BURNT = 0x000000000000000000000000000000000000dEaD;

    function juror(uint256 n) private pure returns (address) {
        return address(uint160(0x1000 + n));
    }

    function enroll(uint256 n, uint32 tickets) private {
        fund(juror(n), uint256(tickets) * BOND);
        vm.prank(juror(n));
        committee.enroll(tickets);
    }

    /// @dev RLP of a header whose fields are empty but for the randomness; long enough to need a length of two bytes.
    function headerOf(bytes32 randao) private pure returns (bytes memory) {
        bytes memory bloom = abi.encodePacked(hex"b90100", new bytes(256));
        bytes memory fields = abi.encodePacked(hex"808080808080", bloom, hex"808080808080", hex"a0", randao, hex"80");
        return abi.encodePacked(hex"f9", uint16(fields.length), fields);
    }

    function seal(bytes32 jobId, bytes32 randao) private {
        uint48 seedBlock = committee.caseOf(jobId).seedBlock;
        if (block.number <= seedBlock) vm.roll(seedBlock + 1);
        vm.setBlockhash(seedBlock, keccak256(headerOf(randao)));
        committee.seal(jobId, headerOf(randao));
    }

    function commit(bytes32 jobId, uint256 n, IResolver.Outcome vote) private {
        bytes32 said = keccak256(abi.encode(jobId, juror(n), uint32(0), vote, RESULT, bytes32(n)));
        vm.prank(juror(n));
        committee.commit(jobId, 0, said);
    }

    function reveal(bytes32 jobId, uint256 n, IResolver.Outcome vote) private {
        vm.prank(juror(n));
        committee.reveal(jobId, 0, vote, RESULT, bytes32(n));
    }

    /// @dev Each bit of `votes` is one juror's: the fee is shared to the last unit by those who voted with the outcome.
    function testFuzz_theFeeIsSharedToTheLastUnit(uint128 amount, uint8 votes, uint8 silent) public {
        amount = uint128(within(amount, 1, PURSE / 2));
        for (uint256 n = 0; n < 5; ++n) enroll(n, 1);
        IJobs.Quote memory quote = disputed(amount, amount, address(committee), 1);
        bytes32 jobId = jobs.jobIdOf(quote);
        seal(jobId, keccak256("seed"));
        for (uint256 n = 0; n < 5; ++n) commit(jobId, n, votes >> n & 1 == 1 ? IResolver.Outcome.Accept : IResolver.Outcome.Reject);
        vm.warp(committee.caseOf(jobId).commitEnds);
        uint256 accepts;
        uint256 rejects;
        for (uint256 n = 0; n < 5; ++n) {
            if (silent >> n & 1 == 1) continue;
            bool yes = votes >> n & 1 == 1;
            reveal(jobId, n, yes ? IResolver.Outcome.Accept : IResolver.Outcome.Reject);
            if (yes) ++accepts;
            else ++rejects;
        }
        vm.warp(block.timestamp + 14 days);
        disputes.resolve(quote);

        uint256 fee = disputes.disputeOf(jobId).fee;
        uint256 bond = (uint256(amount) + 9) / 10;
        same(fee, accepts + rejects < 2 ? 0 : bond / 2, "fee");
        uint256 paid;
        for (uint256 n = 0; n < 5; ++n) {
            bool yes = votes >> n & 1 == 1;
            bool wins = silent >> n & 1 == 0 && (accepts == rejects || (accepts > rejects) == yes) && fee > 0;
            vm.prank(juror(n));
            if (!wins) vm.expectRevert(abi.encodeWithSelector(ICommittee.Committee_NoFee.selector, jobId, juror(n), 0));
            uint256 share = committee.claimFee(quote, 0);
            if (wins) paid += share;
        }
        same(paid, fee, "paid");
        same(balance(address(committee)), 0, "left over");
        same(locked(address(committee)), 5 * BOND, "tickets");
    }

    function testFuzz_onlyTheHeaderOfTheSeedBlockSeals(bytes32 randao, uint256 flip) public {
        enroll(0, 1);
        bytes32 jobId = jobs.jobIdOf(disputed(1000, 1000, address(committee), 1));
        uint48 seedBlock = committee.caseOf(jobId).seedBlock;
        vm.roll(seedBlock + 1 + flip % 255);
        bytes memory header = headerOf(randao);
        vm.setBlockhash(seedBlock, keccak256(header));
        bytes memory wrong = headerOf(randao);
        wrong[flip % wrong.length] ^= 0x01;
        vm.expectRevert(abi.encodeWithSelector(ICommittee.Committee_WrongHeader.selector, seedBlock));
        committee.seal(jobId, wrong);
        committee.seal(jobId, header);
        require(committee.caseOf(jobId).seed == keccak256(abi.encode(randao, jobId)), "seed");
    }

    function testFuzz_bondsLeaveAfterTheDelayAndWhole(uint32 bought, uint32 sold, uint256 wait) public {
        bought = uint32(within(bought, 1, 1_000_000));
        sold = uint32(within(sold, 1, bought));
        wait = within(wait, 0, 14 days - 1);
        enroll(0, bought);
        vm.prank(juror(0));
        committee.resign(sold);
        uint256 freeAt = block.timestamp + 14 days;
        vm.warp(block.timestamp + wait);
        vm.expectRevert(abi.encodeWithSelector(ICommittee.Committee_TooEarly.selector, freeAt, block.timestamp));
        vm.prank(juror(0));
        committee.withdrawBond();
        vm.warp(freeAt);
        vm.prank(juror(0));
        committee.withdrawBond();
        same(balance(juror(0)), uint256(sold) * BOND, "back");
        same(locked(address(committee)), uint256(bought - sold) * BOND, "kept");
    }

    function testFuzz_aCommitmentBindsItsJuror(uint256 thief) public {
        thief = within(thief, 1, 4);
        for (uint256 n = 0; n < 5; ++n) enroll(n, 1);
        bytes32 jobId = jobs.jobIdOf(disputed(1000, 1000, address(committee), 1));
        seal(jobId, keccak256("seed"));
        bytes32 said =
            keccak256(abi.encode(jobId, juror(0), uint32(0), IResolver.Outcome.Accept, RESULT, bytes32(0)));
        vm.prank(juror(0));
        committee.commit(jobId, 0, said);
        vm.prank(juror(thief));
        committee.commit(jobId, 0, said);
        vm.warp(committee.caseOf(jobId).commitEnds);
        reveal(jobId, 0, IResolver.Outcome.Accept);
        vm.prank(juror(thief));
        vm.expectRevert(abi.encodeWithSelector(ICommittee.Committee_BadReveal.selector, juror(thief), 0));
        committee.reveal(jobId, 0, IResolver.Outcome.Accept, RESULT, bytes32(0));
    }

    function testFuzz_silenceBurnsATenthOnceAndOfNobodyElse(uint8 cases, bool resigns) public {
        uint256 many = within(cases, 1, 14);
        enroll(0, 1);
        enroll(1, 1);
        bytes32[] memory ids = new bytes32[](many);
        for (uint256 n = 0; n < many; ++n) ids[n] = jobs.jobIdOf(disputed(1000, 1000, address(committee), n));
        for (uint256 n = 0; n < many; ++n) seal(ids[n], keccak256("seed"));
        for (uint256 n = 0; n < many; ++n) commit(ids[n], 0, IResolver.Outcome.Accept);
        if (resigns) {
            vm.prank(juror(0));
            committee.resign(1);
        }
        vm.warp(committee.caseOf(ids[0]).revealEnds);
        for (uint256 n = 0; n < many; ++n) {
            committee.forfeit(ids[n], juror(0), 0);
            vm.expectRevert(
                abi.encodeWithSelector(ICommittee.Committee_NothingToForfeit.selector, ids[n], juror(0), 0)
            );
            committee.forfeit(ids[n], juror(0), 0);
        }
        uint256 burnt = many > 10 ? BOND : many * (BOND / 10);
        same(balance(BURNT), burnt, "burnt");
        same(locked(address(committee)), 2 * BOND - burnt, "kept");
        same(committee.jurorOf(juror(0)).leaving, BOND - burnt, "leaving");
    }

    function testFuzz_nobodyElseBringsACase(address stranger, bytes32 jobId) public {
        vm.assume(stranger != address(disputes));
        vm.prank(stranger);
        vm.expectRevert(abi.encodeWithSelector(ICommittee.Committee_NotDisputes.selector, stranger));
        committee.begin(jobId, 0, 0, 0);
    }
}
