// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IWorkers} from "../src/interfaces/IWorkers.sol";
import {Fixture} from "./Fixture.sol";

contract WorkersTest is Fixture {
    address private constant PAYOUT = address(0x9999);

    function consent(uint256 key, address owner, uint256 nonce) private view returns (bytes memory) {
        return signed(key, workers.hotKeyDigest(owner, vm.addr(WORKER), PAYOUT, nonce, FOREVER));
    }

    function testFuzz_registerNeedsTheHotKey(uint256 key) public {
        key = within(key, 1, 2 ** 128);
        address hot = vm.addr(WORKER);
        bytes memory proof = consent(key, address(this), 0);
        if (key != WORKER) vm.expectRevert(abi.encodeWithSelector(IWorkers.Workers_BadSignature.selector, hot));
        workers.register(hot, PAYOUT, FOREVER, proof);
    }

    function testFuzz_aRetiredKeyStaysItsOwners(address thief) public {
        vm.assume(thief != address(this));
        address hot = vm.addr(WORKER);
        workers.register(hot, PAYOUT, FOREVER, consent(WORKER, address(this), 0));
        workers.revoke(hot);
        bytes memory proof = consent(WORKER, thief, 1);
        vm.prank(thief);
        vm.expectRevert(abi.encodeWithSelector(IWorkers.Workers_HotKeyTaken.selector, hot, address(this)));
        workers.register(hot, PAYOUT, FOREVER, proof);
        require(workers.payoutOf(hot) == PAYOUT, "payout moved");
    }

    function testFuzz_onlyTheOwnerActs(address stranger) public {
        vm.assume(stranger != address(this));
        address hot = vm.addr(WORKER);
        workers.register(hot, PAYOUT, FOREVER, consent(WORKER, address(this), 0));
        bytes memory no = abi.encodeWithSelector(IWorkers.Workers_NotOwner.selector, hot, stranger);
        vm.prank(stranger);
        vm.expectRevert(no);
        workers.setPayout(hot, stranger);
        vm.prank(stranger);
        vm.expectRevert(no);
        workers.revoke(hot);
        vm.prank(stranger);
        vm.expectRevert(no);
        workers.rotate(hot, stranger, FOREVER, "");
    }

    function testFuzz_anUnknownKeyIsPaidItself(address hot) public view {
        require(workers.payoutOf(hot) == hot && workers.ownerOf(hot) == address(0), "unknown key");
    }

    function testFuzz_onlyModulesHoldLockAndSlash(address stranger) public {
        vm.assume(!vault.isModule(stranger));
        bytes memory no = abi.encodeWithSelector(IWorkers.Workers_NotModule.selector, stranger);
        address hot = vm.addr(WORKER);
        vm.prank(stranger);
        vm.expectRevert(no);
        workers.hold(hot, address(token), 1);
        vm.prank(stranger);
        vm.expectRevert(no);
        workers.letGo(hot, address(token), 0);
        vm.prank(stranger);
        vm.expectRevert(no);
        workers.lockForEarnings(hot, address(token), 1);
        vm.prank(stranger);
        vm.expectRevert(no);
        workers.bookSlash(hot, address(token), 1, stranger, stranger, 0);
        vm.prank(stranger);
        vm.expectRevert(no);
        workers.convict(hot, 0);
    }

    function testFuzz_aSlashStaysUnderStakeAndCapAndIsSharedWhole(
        uint128 staked,
        uint128 leaving,
        uint128 wanted,
        uint256 waited
    ) public {
        staked = uint128(within(staked, 1, type(uint128).max / 2));
        leaving = uint128(within(leaving, 0, staked));
        _stake(staked, leaving);
        vm.prank(address(channels));
        (uint256 slashId, uint128 booked) =
            workers.bookSlash(vm.addr(WORKER), address(token), wanted, address(1), address(2), 0);
        same(booked, wanted < staked / 2 ? wanted : staked / 2, "I7");
        IWorkers.Stake memory left = workers.stakeOf(address(this), address(token));
        same(uint256(left.active) + left.unbonding, staked - booked, "taken from the stake");
        same(left.unbonding, booked < leaving ? leaving - booked : 0, "the leaving part first");
        if (booked == 0) return;
        uint256 now_ = block.timestamp + within(waited, 0, 14 days);
        uint256 movesAt = block.timestamp + 7 days;
        vm.warp(now_);
        if (now_ < movesAt) {
            vm.expectRevert(abi.encodeWithSelector(IWorkers.Workers_TooEarly.selector, movesAt, now_));
            workers.moveSlash(slashId);
            workers.cancelSlash(slashId);
            same(workers.stakeOf(address(this), address(token)).active, left.active + booked, "given back");
        } else {
            workers.moveSlash(slashId);
            same(balance(address(1)), booked / 2, "victim");
            same(balance(address(2)), booked / 4, "reporter");
            same(balance(workers.BURN()), booked - booked / 2 - booked / 4, "burnt (I11)");
            same(vault.lockedBy(address(workers), address(token)), staked - booked, "lock");
        }
        vm.expectRevert(abi.encodeWithSelector(IWorkers.Workers_NotBooked.selector, slashId));
        workers.moveSlash(slashId);
    }

    function testFuzz_stakeLeavesAfterTheDelayAndNeverWhileLocked(
        uint128 staked,
        uint128 leaving,
        uint128 held,
        uint128 earned,
        uint256 waited
    ) public {
        staked = uint128(within(staked, 1, type(uint128).max / 2));
        leaving = uint128(within(leaving, 1, staked));
        held = uint128(within(held, 0, staked));
        _stake(staked, leaving);
        uint256 freeAt = block.timestamp + 52 days;
        vm.warp(block.timestamp + within(waited, 0, 60 days));
        vm.prank(address(channels));
        workers.hold(vm.addr(WORKER), address(token), held);
        vm.prank(address(channels));
        workers.lockForEarnings(vm.addr(WORKER), address(token), earned);
        uint256 kept = workers.lockedStake(address(this), address(token));
        // What is held counts as free for the earnings' lock, so both together may be more than there is.
        require(kept >= held && kept - held <= staked, "locked what is not there");
        uint256 rest = staked > kept ? staked - kept : 0;
        uint256 free = rest < leaving ? rest : leaving;
        if (block.timestamp < freeAt) {
            vm.expectRevert(abi.encodeWithSelector(IWorkers.Workers_TooEarly.selector, freeAt, block.timestamp));
        } else if (free == 0) {
            vm.expectRevert(
                abi.encodeWithSelector(IWorkers.Workers_NothingFree.selector, address(this), address(token))
            );
        }
        workers.withdrawStake(address(token));
        uint256 out = block.timestamp < freeAt ? 0 : free;
        same(balance(address(this)), out, "I8");
        require(vault.lockedBy(address(workers), address(token)) >= (kept < staked ? kept : staked), "what is locked stays");
    }

    function testFuzz_noHoldAboveExposureOrStake(uint128 staked, uint128 exposure, uint128 first, uint128 second) public {
        staked = uint128(within(staked, 1, type(uint128).max / 2));
        _stake(staked, 0);
        workers.setExposure(address(token), exposure);
        uint256 held;
        for (uint256 i = 0; i < 2; ++i) {
            uint128 amount = i == 0 ? first : second;
            bool good = held + amount <= exposure && held + amount <= staked;
            vm.prank(address(channels));
            (bool went,) = address(workers)
                .call(abi.encodeCall(workers.hold, (vm.addr(WORKER), address(token), amount)));
            require(went == good, "held");
            if (good) held += amount;
        }
        same(workers.stakeOf(address(this), address(token)).held, held, "sum");
    }

    function testFuzz_lockingEarningsNeverReverts(uint128 staked, uint256[4] calldata earned, uint32[4] calldata apart) public {
        _stake(uint128(within(staked, 1, type(uint128).max / 2)), 0);
        for (uint256 i = 0; i < 4; ++i) {
            vm.warp(block.timestamp + apart[i]);
            vm.prank(address(channels));
            workers.lockForEarnings(vm.addr(WORKER), address(token), earned[i]);
            IWorkers.Stake memory stake = workers.stakeOf(address(this), address(token));
            require(workers.lockedStake(address(this), address(token)) <= stake.active, "more than there is");
        }
        vm.warp(block.timestamp + 14 days);
        same(workers.lockedStake(address(this), address(token)), 0, "I12: for two windows at most");
    }

    function testFuzz_aConvictedKeyNeverComesBack(address owner, uint256 nonce) public {
        vm.assume(owner != address(0));
        vm.prank(address(channels));
        require(workers.convict(vm.addr(WORKER), 0), "first");
        vm.prank(address(channels));
        require(!workers.convict(vm.addr(WORKER), 0), "convicted twice");
        bytes memory proof = consent(WORKER, owner, nonce % 2);
        vm.prank(owner);
        vm.expectRevert(abi.encodeWithSelector(IWorkers.Workers_Convicted.selector, vm.addr(WORKER)));
        workers.register(vm.addr(WORKER), PAYOUT, FOREVER, proof);
    }

    /// @dev The test is the owner: `staked` of which `leaving` is on its way out, and no bound but the stake.
    function _stake(uint128 staked, uint128 leaving) private {
        workers.register(vm.addr(WORKER), PAYOUT, FOREVER, consent(WORKER, address(this), 0));
        token.mint(address(this), staked);
        token.approve(address(vault), staked);
        vault.deposit(address(token), staked, address(this));
        workers.stake(address(token), staked);
        workers.setExposure(address(token), type(uint128).max);
        if (leaving > 0) workers.unstake(address(token), leaving);
    }
}
