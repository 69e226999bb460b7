// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IWorkers} from "../src/interfaces/IWorkers.sol";
import {Fixture} from "./Fixture.sol";

/// @dev Proved by halmos for every value of the arguments: `scripts/check-proofs`. The owner has PURSE in the vault; what only a
/// module may call is called as Channels. The shares of a slash are divisions of a symbol, which the solver can not decide in
/// useful time: they are the attacker's (node/testing) and forge's.
contract WorkersProofs is Fixture {
    /// @dev A plain address: those of keys are symbols to halmos, which might be equal to any other.
    address private constant OWNER = address(0x3333);
    address private hotKey;

    function setUp() public override {
        super.setUp();
        hotKey = config.receiver;
        token.mint(address(this), PURSE);
        token.approve(address(vault), PURSE);
        vault.deposit(address(token), PURSE, OWNER);
        bytes32 consent = workers.hotKeyDigest(OWNER, hotKey, OWNER, 0, FOREVER);
        vm.prank(OWNER);
        workers.register(hotKey, OWNER, FOREVER, signed(WORKER, consent));
    }

    function _staked(uint128 active, uint128 leaving) private {
        vm.assume(active <= PURSE && leaving <= active && active > 0);
        vm.prank(OWNER);
        workers.stake(address(token), active);
        if (leaving == 0) return;
        vm.prank(OWNER);
        workers.unstake(address(token), leaving);
    }

    /// I8: what earnings lock stays, however late; and no size of a payment makes the lock fail.
    function check_lockedStakeStays(uint128 staked, uint128 leaving, uint256 earned) public {
        _staked(staked, leaving);
        vm.warp(block.timestamp + workers.UNBONDING());
        vm.prank(address(channels));
        workers.lockForEarnings(hotKey, address(token), earned);
        uint256 locked = workers.lockedStake(OWNER, address(token));
        vm.prank(OWNER);
        (bool taken,) = address(workers).call(abi.encodeCall(workers.withdrawStake, (address(token))));
        IWorkers.Stake memory left = workers.stakeOf(OWNER, address(token));
        uint256 total = uint256(left.active) + left.unbonding;
        assert(locked <= staked && total >= locked);
        assert(taken || total == staked);
        assert(balance(OWNER) == PURSE - total);
    }
}
